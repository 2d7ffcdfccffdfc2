"""Alerting: rules for Prometheus, their unit tests, and a runbook for each."""
