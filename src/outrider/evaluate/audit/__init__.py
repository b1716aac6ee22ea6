"""The audit: is a generator's text distributed as the target's?"""
