"""The Ray Serve deployments of the service, and the Ray below them."""
