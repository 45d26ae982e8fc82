"""Reports: ranks compared, and chosen for each layer."""
