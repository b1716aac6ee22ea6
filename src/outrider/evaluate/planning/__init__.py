"""What speed to expect, and whether to speculate at all."""
