"""Reports: ranks compared, and ranks chosen for each layer."""
