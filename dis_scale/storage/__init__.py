"""Object storage and disk: folders by URL, manifests that make things exist, leases that keep one writer."""
