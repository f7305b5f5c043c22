"""Public fakes and contracts: what every leaf is measured against."""
