"""The commands, a file each: its flags as a dataclass, and main(argv)."""
