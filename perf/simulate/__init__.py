"""Simulates the routing and the scaling of a large service, with the functions of the product that decide them."""
