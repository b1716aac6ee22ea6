"""Is an engine still exact?"""
