from hypothesis import HealthCheck, settings

# A busy machine is no failure, and a failure comes again.
settings.register_profile("engine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("engine")
