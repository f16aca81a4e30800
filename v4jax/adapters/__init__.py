"""What training changed: adapters and runs, applied, merged and exported."""
