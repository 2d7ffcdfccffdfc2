"""Alerts: their rules, who is told of them, and the history of when they were."""
