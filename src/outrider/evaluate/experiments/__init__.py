"""A/B tests, offline and on live traffic."""
