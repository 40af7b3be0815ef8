"""What is minimised: a surrogate, weights and regularisers over the token table."""
