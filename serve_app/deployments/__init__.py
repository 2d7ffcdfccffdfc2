"""The Ray Serve deployments of the service, and the start of a local Ray."""
