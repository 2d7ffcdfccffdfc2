"""Load tests of an LLM service over HTTP; imports nothing of serve_app."""
