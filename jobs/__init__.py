"""The batch job: trains, compares and reports variants of Inception-v3."""
