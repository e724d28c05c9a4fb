"""Settings as package data: ready-made training settings (*.toml) and Slurm job scripts (*.sbatch)."""
