"""What run.sh starts: the checks before a run, its plan, the servers, and the stages in order."""
