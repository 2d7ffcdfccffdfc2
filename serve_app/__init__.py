"""serve_app: an LLM inference service as a Ray Serve deployment graph."""

__version__ = "0.1.0"
