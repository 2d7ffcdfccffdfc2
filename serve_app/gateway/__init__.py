"""The path from an HTTP call to a model: a chain of stages, each of which is an Engine in front of the next one.

From the outside inwards: Experiments measures the requests of experiments; Catalog picks the model's chain; Outcome
counts the request and maps errors; ResponseCache, if it is configured, sends the answer to an earlier request again;
Workload measures the work that waits, for the autoscaler; Readiness waits for a sleeping model; Admission decides which
waiting request goes next; Failover continues the answer of a lost replica. Quotas belong between Catalog and Outcome.
"""
