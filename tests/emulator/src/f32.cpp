#include "entries.h"
ENTRIES(f32, float)
