"""What every test shares: hypothesis profiles, nothing else. Peers and pools belong to the folders that use
them."""

import os

from hypothesis import HealthCheck, settings

# No deadline per example: on two busy cores it says more about the neighbours than about the code. Time
# limits are tests of their own.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("KVT_HYPOTHESIS", "default"))
