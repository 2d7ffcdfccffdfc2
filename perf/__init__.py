"""Load tests of an LLM service as a black box over HTTP: nothing here knows what serve_app is made of."""
