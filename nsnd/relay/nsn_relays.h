/* All relays of a node: they ask here whether a message may go to a client. */
#ifndef NSN_RELAYS_H
#define NSN_RELAYS_H

struct nsn_relays;
/* NULL: no memory. There is one as long as any relay runs: nothing frees it. */
struct nsn_relays *nsn_relays_new(void);

#endif
