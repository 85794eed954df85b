"""The only place where a model runs: prepare, plan, forward, pool. Everything that embeds goes through it."""
