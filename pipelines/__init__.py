"""The Ray programs: one per stage, and the driver that submits them. The only folder that imports Ray."""
