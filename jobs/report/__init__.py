"""Statistical comparison of the variants, and the report page."""
