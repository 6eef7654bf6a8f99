"""nsphere in Hugging Face transformers."""
