"""Many runs on one machine or a Slurm cluster."""
