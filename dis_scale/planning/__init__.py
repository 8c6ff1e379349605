"""Plans: the cost of a sweep, fleets of machines, studies of compute budgets, a first recipe for own images."""
