"""The methods of the leaderboard: each a function with `@method` (studies/lab.py)."""
