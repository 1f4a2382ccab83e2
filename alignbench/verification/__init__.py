"""Whether records are what runs left, whether a replay gives them again, and a leaderboard of those that are."""
