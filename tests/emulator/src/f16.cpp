#include "entries.h"
ENTRIES(f16, f16)
