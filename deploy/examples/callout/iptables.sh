#!/bin/sh
# As nft.sh, with iptables and ip6tables: chains called PROXIER, jumped to from PREROUTING and OUTPUT, and filled anew at every
# change. An address has one pod of this node here, the first: iptables has no choice that keeps a client on its pod whatever port it
# speaks to next. Needs jq and iptables.
#
# To take it off, for iptables and ip6tables, for the tables mangle and nat: iptables -t TABLE -D PREROUTING -j PROXIER, the same of
# OUTPUT, iptables -t TABLE -F PROXIER, iptables -t TABLE -X PROXIER
set -eu

lines=$(cat)

# The rules of a family ("V4", "V6"), as iptables-restore reads them. Naming a chain with a colon empties it.
rules() {
  printf '%s\n' "$lines" | jq --raw-output --slurp --arg family "$1" '
    [.[] as {$Service, $Endpoints}
      | [$Endpoints // [] | .[] | select(.Local) | .IPs[$family] // [] | .[]] as $pods
      | [$Service.IPs | (.ExternalIPs, .LoadBalancerIPs) | .[$family]? // [] | .[]] | unique | .[] as $address
      | [$Service.IPFilters // [] | .[] | select(.TargetIPs == null or (.TargetIPs[$family] // [] | index($address) != null))] as $filters
      | {
          $address,
          pod: ($pods | unique | first),
          sources: (if $filters == [] then null
                    else [$filters[].SourceRanges // [] | .[] | select(contains(":") == ($family == "V6"))] end)
        }
    ]
    | "*mangle",
      ":PROXIER - [0:0]",
      # ICMP errors about conversations that were let in, from whatever router.
      "-A PROXIER -m conntrack --ctstate RELATED -j RETURN",
      (.[] | select(.pod == null) | "-A PROXIER -d \(.address) -j DROP"),
      (.[] | select(.pod != null and .sources != null)
        | (.sources[] as $source | "-A PROXIER -d \(.address) -s \($source) -j RETURN"), "-A PROXIER -d \(.address) -j DROP"),
      "COMMIT",
      "*nat",
      ":PROXIER - [0:0]",
      (.[] | select(.pod != null) | "-A PROXIER -d \(.address) -j DNAT --to-destination \(.pod)"),
      "COMMIT"
  '
}

# `apply iptables V4`
apply() {
  rules=$(rules "$2")
  printf '%s\n' "$rules" | "$1-restore" --wait --noflush
  for table in mangle nat; do
    for chain in PREROUTING OUTPUT; do
      "$1" --wait --table "$table" --check "$chain" --jump PROXIER 2>/dev/null ||
        "$1" --wait --table "$table" --insert "$chain" --jump PROXIER
    done
  done
}

apply iptables V4
apply ip6tables V6
