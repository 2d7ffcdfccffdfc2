"""Durable batch jobs and what they are made of: files, batches, a journal of lines, and the worker that runs lines."""
