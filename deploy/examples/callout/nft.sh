#!/bin/sh
# Sets up nftables for the Services that `proxier ... to-exec` gives on the standard input, one JSON object a line: every port and
# every protocol of an external address goes to a pod on this node. Needs jq and nft.
#
# All of it is in a table of its own, which one transaction replaces: a packet sees the former rules or the new ones, and what has gone
# leaves nothing behind. Without a Service the table is empty. To take it off: nft delete table inet proxier_callout
set -eu

rules=$(jq --raw-output --slurp '
  # Every external address of a family ("V4", "V6"), with the pods of this node, and with who may send (null: everybody).
  def externals($family):
    .[] as {$Service, $Endpoints}
    | [$Endpoints // [] | .[] | select(.Local) | .IPs[$family] // [] | .[]] as $pods
    | [$Service.IPs | (.ExternalIPs, .LoadBalancerIPs) | .[$family]? // [] | .[]] | unique | .[] as $address
    | [$Service.IPFilters // [] | .[] | select(.TargetIPs == null or (.TargetIPs[$family] // [] | index($address) != null))] as $filters
    | {
        $address,
        pods: ($pods | unique),
        sources: (if $filters == [] then null
                  else [$filters[].SourceRanges // [] | .[] | select(contains(":") == ($family == "V6"))] end)
      };

  # The first of several chains that a packet for an address goes through: who is not let in, and where nobody is.
  def refuse($ip):
    if .pods == [] then "    \($ip) daddr \(.address) drop"
    elif .sources == null then empty
    else (.sources[] as $source | "    \($ip) daddr \(.address) \($ip) saddr \($source) return"), "    \($ip) daddr \(.address) drop"
    end;

  # A client stays on its pod whatever port it speaks to next, and whenever the rules are made anew: hence the seed.
  def translate($ip):
    if .pods == [] then empty
    elif (.pods | length) == 1 then "    \($ip) daddr \(.address) dnat \($ip) to \(.pods[0])"
    else
      (.pods | to_entries | map("\(.key) : \(.value)") | join(", ")) as $map
      | "    \($ip) daddr \(.address) dnat \($ip) to jhash \($ip) saddr mod \(.pods | length) seed 0x70726f78 map { \($map) }"
    end;

  "table inet proxier_callout",
  "delete table inet proxier_callout",
  "table inet proxier_callout {",
  "  chain refuse {",
  # ICMP errors about conversations that were let in, from whatever router.
  "    ct state related return",
  (externals("V4") | refuse("ip")),
  (externals("V6") | refuse("ip6")),
  "  }",
  "  chain translate {",
  (externals("V4") | translate("ip")),
  (externals("V6") | translate("ip6")),
  "  }",
  # Before the destination is another one (-100). What comes from outside and from pods; and what processes of the node send.
  "  chain refuse_prerouting { type filter hook prerouting priority -150; jump refuse; }",
  "  chain refuse_output { type filter hook output priority -150; jump refuse; }",
  "  chain translate_prerouting { type nat hook prerouting priority -100; jump translate; }",
  "  chain translate_output { type nat hook output priority -100; jump translate; }",
  "}"
')
printf '%s\n' "$rules" | nft -f -
