"""Several replicas of the server behind one address: one conversation stays with one replica, and counters are added up."""
