def callbacks():
    return []
