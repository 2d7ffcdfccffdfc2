"""OpenAI's endpoints for files and batches."""
