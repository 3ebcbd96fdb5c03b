"""Cohorts of medical images: table, checks, files in and out with geometry, batches. Knows no model."""
