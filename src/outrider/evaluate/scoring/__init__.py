"""What texts are worth: scores, qualities, divergences, costs."""
