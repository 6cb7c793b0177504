"""Projection: any matrix onto a structured family, with a certificate."""
