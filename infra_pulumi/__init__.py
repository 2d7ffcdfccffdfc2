"""GPU clusters on AWS, GCP and Azure from one description; plan, policy and cost need no cloud."""
