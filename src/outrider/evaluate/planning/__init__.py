"""What to run: acceptance predicted from logs, plans and trees for this machine."""
