"""What every launcher shares: the job, its configuration, and who a rank is."""
