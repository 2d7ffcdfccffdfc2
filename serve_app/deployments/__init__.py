"""The corridor: the only room that imports Ray. It carries requests; it decides nothing about generation."""
