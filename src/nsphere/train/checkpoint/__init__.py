"""Checkpoints: a folder that is complete or does not exist, and from which nothing is unpickled.

    RUN/checkpoints/step-00000600/
        model/shard-00001-….safetensors      parameters and persistent buffers under canonical names, tied ones once
        optimizer/shard-00001-….safetensors  state.<parameter name>.<key>, all optimizers together
        state.json                           step, the caller's state, tied names, optimizers' groups and numbers
        manifest.json                        size and sha256 of all the others, and its own sha256; written last

One file a rank and folder; a process by itself has one of each. Everything is written into a hidden folder beside
the others and flushed to the disk; one rename then makes it a checkpoint. Any number of ranks, in any layout, can
load it. See docs/checkpoints.md.

save.py             a training state on its way to the disk, beside the training if asked
load.py             finding, verifying and restoring one
folders.py          the folder of all checkpoints: what is put there, kept and cleared away
manifest.py         the list of a checkpoint's files, with sizes and hashes
tensor_files.py     tensors in safetensors, written and read by any number of ranks
optimizer_state.py  the state of optimizers under the names of parameters
"""

from nsphere.train.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from nsphere.train.checkpoint.save import CheckpointSaver, save_checkpoint

__all__ = ["Checkpoint", "CheckpointSaver", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
