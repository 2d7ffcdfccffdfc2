"""Load tests of an LLM service over HTTP; only `simulate/` imports anything of serve_app."""
