"""Object storage and disk: folders by URL, manifests that make things exist, and leases that allow one writer."""
