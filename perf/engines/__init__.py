"""Load tests of engines: this service with vLLM, `vllm serve`, and this service's native engine, in turn."""
