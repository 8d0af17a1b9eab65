"""The parts of soak.py: faults, jobs that suffer them, the two arms, and the accounts of what they did."""
