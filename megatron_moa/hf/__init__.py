"""The models of this project for Hugging Face transformers; their files are copied into every export."""
