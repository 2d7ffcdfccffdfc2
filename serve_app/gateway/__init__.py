"""The path from an HTTP call to a model: stages, each of which wraps an Engine and is an Engine itself.

From the outside inwards: Catalog picks the model's chain; Outcome counts the request and maps errors; Readiness waits
for a sleeping model; Admission decides which waiting request goes next. Quotas belong between Catalog and Outcome, a
response cache between Outcome and Readiness, failover inside Admission.
"""
